//! The kernel as QEMU starts it fastest: out of the compressed bzImage that distributions ship, the ELF file that is in it, and of
//! that what is loaded.
//!
//! A bzImage unpacks itself in the guest, which costs a large part of the boot without KVM and a copy of the packed image in each
//! QEMU. The ELF file starts at its PVH entry ("x86/HVM direct boot ABI" of Xen, which QEMU's `-kernel` follows), and QEMU maps it,
//! so that all machines of a host share its pages. What is lost: the unpacking code chooses the kernel's address at random
//! (KASLR), the PVH entry does not.
//!
//! Layout of a bzImage: Linux, Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".

use std::io::{Read, Take};

use flate2::read::GzDecoder;
use object::elf::{EM_X86_64, FileHeader64, NoteType, PT_LOAD, PT_NOTE, ProgramHeader64, SHN_UNDEF};
use object::pod::bytes_of;
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, U16, U64};
use ruzstd::decoding::StreamingDecoder;

/// Offsets in the boot header, and the length of a sector of the code that precedes the kernel proper.
const SETUP_SECTORS_OFFSET: usize = 0x1f1;
const SIGNATURE_OFFSET: usize = 0x202;
const PROTOCOL_VERSION_OFFSET: usize = 0x206;
const PAYLOAD_OFFSET_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH_OFFSET: usize = 0x24c;
const SECTOR_LEN: usize = 512;

/// The number of set-up sectors if the header says 0.
const DEFAULT_SETUP_SECTORS: usize = 4;

/// The first version of the boot protocol that tells where the payload is.
const FIRST_VERSION_WITH_PAYLOAD: u16 = 0x0208;

/// First bytes of the two kinds of payload that are read (boot.rst, "payload_offset").
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// No kernel is larger, unpacked, in bytes.
const MAX_KERNEL_LEN: u64 = 512 << 20;

/// Lengths of an ELF file's headers.
const FILE_HEADER_LEN: usize = size_of::<FileHeader64<Endianness>>();
const PROGRAM_HEADER_LEN: usize = size_of::<ProgramHeader64<Endianness>>();

/// The ELF note that holds the 32-bit entry for PVH: its name and type (Xen, public/elfnote.h).
const XEN_NOTE_NAME: &[u8] = b"Xen";
const XEN_ELFNOTE_PHYS32_ENTRY: NoteType = NoteType(18);

/// Why a kernel image is not unpacked.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// No boot header, or one without a payload in it.
    #[error("it is no bzImage whose header (boot protocol 2.08 or later) tells where the payload is")]
    NoPayload,
    /// Compressed in a way that is not read here.
    #[error("its payload begins with {0:02x?}; only kernels compressed with zstd or gzip are unpacked")]
    Compression([u8; 4]),
    /// The payload is damaged.
    #[error("its payload cannot be decompressed")]
    Damaged(#[source] std::io::Error),
    /// The payload is longer than any kernel.
    #[error("its payload has more than {MAX_KERNEL_LEN} bytes")]
    TooLong,
    /// It is no ELF file, unpacked or as it was built.
    #[error("there is no readable ELF file in it")]
    Elf(#[from] object::read::Error),
    /// The ELF file is no x86-64 kernel with an entry for PVH.
    #[error("there is no x86-64 kernel with a PVH entry (CONFIG_PVH) in it")]
    NoPvh,
}

/// The ELF file in a bzImage, reduced to what is loaded: segments without the zeros at their ends, and notes.
///
/// # Errors
/// [`KernelError`]; QEMU would start none of what is refused.
pub fn kernel_elf(bzimage: &[u8]) -> Result<Vec<u8>, KernelError> {
    loaded_parts(&unpacked(payload(bzimage).ok_or(KernelError::NoPayload)?)?)
}

/// The compressed kernel.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let u16_at = |offset: usize| image.get(offset..)?.first_chunk().map(|bytes| u16::from_le_bytes(*bytes));
    let length_at = |offset: usize| {
        let bytes = image.get(offset..)?.first_chunk()?;
        usize::try_from(u32::from_le_bytes(*bytes)).ok()
    };
    image.get(SIGNATURE_OFFSET..)?.strip_prefix(b"HdrS")?;
    if u16_at(PROTOCOL_VERSION_OFFSET)? < FIRST_VERSION_WITH_PAYLOAD {
        return None;
    }
    let setup_sectors = match usize::from(*image.get(SETUP_SECTORS_OFFSET)?) {
        0 => DEFAULT_SETUP_SECTORS,
        sectors => sectors,
    };
    // The boot sector comes before those that are counted.
    let start = (setup_sectors + 1) * SECTOR_LEN + length_at(PAYLOAD_OFFSET_OFFSET)?;
    image.get(start..)?.get(..length_at(PAYLOAD_LENGTH_OFFSET)?)
}

/// The decompressed payload. The kernel's build appends the length in four bytes to what the compressor wrote; gzip has the same
/// in its own trailer. Decoders stop before it.
fn unpacked(payload: &[u8]) -> Result<Vec<u8>, KernelError> {
    if payload.starts_with(&ZSTD_MAGIC) {
        let decoder =
            StreamingDecoder::new(payload).map_err(|error| KernelError::Damaged(std::io::Error::other(error)))?;
        return read_whole(decoder.take(MAX_KERNEL_LEN + 1));
    }
    if payload.starts_with(&GZIP_MAGIC) {
        return read_whole(GzDecoder::new(payload).take(MAX_KERNEL_LEN + 1));
    }
    Err(KernelError::Compression(payload.first_chunk().copied().unwrap_or_default()))
}

fn read_whole(mut decoder: Take<impl Read>) -> Result<Vec<u8>, KernelError> {
    let mut bytes = Vec::new();
    decoder.read_to_end(&mut bytes).map_err(KernelError::Damaged)?;
    if bytes.len() as u64 > MAX_KERNEL_LEN { Err(KernelError::TooLong) } else { Ok(bytes) }
}

/// The same kernel without sections, and without the zeros at the ends of its segments, which the loader makes.
///
/// # Errors
/// [`KernelError::Elf`] and [`KernelError::NoPvh`].
pub(crate) fn loaded_parts(kernel: &[u8]) -> Result<Vec<u8>, KernelError> {
    let old = FileHeader64::<Endianness>::parse(kernel)?;
    let endian = old.endian()?;
    if old.e_machine(endian) != EM_X86_64 || !has_pvh_entry(old, endian, kernel)? {
        return Err(KernelError::NoPvh);
    }
    let is_kept = |segment: &&ProgramHeader64<Endianness>| matches!(segment.p_type(endian), PT_LOAD | PT_NOTE);
    let segments: Vec<_> = old.program_headers(endian, kernel)?.iter().filter(is_kept).collect();
    let mut header = *old;
    header.e_phoff = U64::new(endian, FILE_HEADER_LEN as u64);
    header.e_phnum = U16::new(endian, u16::try_from(segments.len()).map_err(|_| KernelError::NoPvh)?);
    header.e_shoff = U64::new(endian, 0);
    header.e_shnum = U16::new(endian, 0);
    header.e_shstrndx = U16::new(endian, SHN_UNDEF);
    let content_offset = FILE_HEADER_LEN + segments.len() * PROGRAM_HEADER_LEN;
    let mut headers = bytes_of(&header).to_vec();
    let mut content = Vec::new();
    for segment in segments {
        let data = segment.data(endian, kernel).map_err(|()| KernelError::NoPvh)?;
        let len = data.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let mut segment = *segment;
        segment.p_offset = U64::new(endian, (content_offset + content.len()) as u64);
        segment.p_filesz = U64::new(endian, len as u64);
        headers.extend_from_slice(bytes_of(&segment));
        content.extend(data.iter().take(len));
    }
    headers.append(&mut content);
    Ok(headers)
}

fn has_pvh_entry(header: &FileHeader64<Endianness>, endian: Endianness, kernel: &[u8]) -> Result<bool, KernelError> {
    for segment in header.program_headers(endian, kernel)? {
        let Some(mut notes) = segment.notes(endian, kernel)? else { continue };
        while let Some(note) = notes.next()? {
            if note.name() == XEN_NOTE_NAME && note.n_type(endian) == XEN_ELFNOTE_PHYS32_ENTRY {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// A bzImage with this payload.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 2 * SECTOR_LEN];
        image[SETUP_SECTORS_OFFSET] = 1;
        image[SIGNATURE_OFFSET..][..4].copy_from_slice(b"HdrS");
        image[PROTOCOL_VERSION_OFFSET..][..2].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[PAYLOAD_OFFSET_OFFSET..][..4].copy_from_slice(&16_u32.to_le_bytes());
        image[PAYLOAD_LENGTH_OFFSET..][..4].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend([0xcc; 16]);
        image.extend(payload);
        image.extend([0xcc; 64]);
        image
    }

    /// An ELF file with a segment that ends in zeros, one that is never loaded, and a note of this type.
    fn elf(NoteType(note_type): NoteType) -> Vec<u8> {
        let note = [&4_u32.to_le_bytes()[..], &4_u32.to_le_bytes(), &note_type.to_le_bytes(), b"Xen\0", &[1, 0, 0, 1]]
            .concat();
        let parts: [(u32, &[u8], u64); 3] =
            [(1, b"text\0\0\0\0", 64), (0x6474_e551, b"gone", 4), (4, &note, note.len() as u64)];
        let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        for word in [0x100_0000_u64, 64, 0xffff] {
            file.extend(word.to_le_bytes());
        }
        file.extend([0, 0, 0, 0, 64, 0, 56, 0, 3, 0, 64, 0, 9, 0, 8, 0]);
        let mut offset = 64 + 3 * 56;
        for (kind, data, memory_len) in parts {
            file.extend([kind.to_le_bytes(), 5_u32.to_le_bytes()].concat());
            for word in [offset, 0xffff_ffff_8100_0000, 0x100_0000, data.len() as u64, memory_len, 4] {
                file.extend(word.to_le_bytes());
            }
            offset += data.len() as u64;
        }
        parts.iter().for_each(|(_, data, _)| file.extend(*data));
        file
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn what_is_loaded_is_kept_and_nothing_else() {
        for pack in [zstd, gzip] {
            let mut payload = pack(&elf(XEN_ELFNOTE_PHYS32_ENTRY));
            payload.extend([7, 7, 7, 7]);
            let kernel = kernel_elf(&bzimage(&payload)).unwrap();
            let header = FileHeader64::<Endianness>::parse(&*kernel).unwrap();
            let endian = header.endian().unwrap();
            assert_eq!((header.e_entry(endian), header.e_shnum.get(endian)), (0x100_0000, 0));
            let segments = header.program_headers(endian, &*kernel).unwrap();
            let [text, note] = segments else { panic!("{} segments", segments.len()) };
            assert_eq!(text.data(endian, &*kernel).unwrap(), b"text");
            assert_eq!((text.p_memsz(endian), text.p_paddr(endian)), (64, 0x100_0000));
            assert_eq!(note.p_type(endian), PT_NOTE);
            assert!(has_pvh_entry(header, endian, &kernel).unwrap());
            assert_eq!(kernel.len(), 64 + 2 * 56 + 4 + 20);
        }
    }

    #[test]
    fn what_qemu_would_not_start_is_refused_by_its_fault() {
        let refusal = |image: &[u8]| kernel_elf(image).unwrap_err().to_string();
        assert!(refusal(b"").contains("no bzImage"));
        assert!(refusal(&bzimage(&zstd(&elf(XEN_ELFNOTE_PHYS32_ENTRY)))[..0x420]).contains("no bzImage"));
        assert!(refusal(&bzimage(b"\xfd7zXZ")).contains("begins with [fd, 37, 7a, 58]"));
        assert!(refusal(&bzimage(&zstd(&elf(NoteType(19))))).contains("PVH"));
        assert!(refusal(&bzimage(&zstd(b"a text"))).contains("no readable ELF"));
        let mut damaged = gzip(&elf(XEN_ELFNOTE_PHYS32_ENTRY));
        damaged.truncate(damaged.len() - 40);
        assert!(refusal(&bzimage(&damaged)).contains("cannot be decompressed"));
    }
}
