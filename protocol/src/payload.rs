//! Little-endian fields of a payload, read and written in order.

use crate::DecodeError;

/// Reads the fields of one payload; [`Reader::finish`] insists that nothing is left.
pub(crate) struct Reader<'a> {
    what: &'static str,
    whole: usize,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, whole: bytes.len(), rest: bytes }
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or_else(|| self.length_error(N))?;
        self.rest = rest;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let (head, rest) = self.rest.split_at_checked(len).ok_or_else(|| self.length_error(len))?;
        self.rest = rest;
        Ok(head)
    }

    /// Padding that the specification reserves: its content is not looked at.
    pub(crate) fn skip(&mut self, len: usize) -> Result<(), DecodeError> {
        self.bytes(len).map(drop)
    }

    pub(crate) fn finish(self) -> Result<(), DecodeError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        let expected = self.whole - self.rest.len();
        Err(DecodeError::Length { what: self.what, expected, found: self.whole })
    }

    fn length_error(&self, wanted: usize) -> DecodeError {
        let expected = self.whole - self.rest.len() + wanted;
        DecodeError::Length { what: self.what, expected, found: self.whole }
    }
}

/// Writes the fields of one payload.
#[derive(Default)]
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub(crate) fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    pub(crate) fn u16(self, value: u16) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(crate) fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(crate) fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn zeros(mut self, len: usize) -> Self {
        self.0.resize(self.0.len() + len, 0);
        self
    }

    pub(crate) fn done(self) -> Vec<u8> {
        self.0
    }
}
