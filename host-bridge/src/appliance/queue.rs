//! Whole buffers in and out of a virtqueue of the appliance. The agent's rings and descriptors are hostile input.

use std::io::{Read, Write};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vvu_protocol::control::MAX_FRAME_LEN;

use super::ApplianceError;

/// Takes the next readable buffer, at most [`MAX_FRAME_LEN`] bytes of it, and gives it back to the agent. `None` if there is
/// none.
pub(crate) fn take_buffer(
    number: u16,
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
) -> Result<Option<Vec<u8>>, ApplianceError> {
    let fault = |error: &dyn std::error::Error| ApplianceError::Queue { queue: number, problem: error.to_string() };
    let Some(chain) = queue.iter(memory).map_err(|error| fault(&error))?.next() else {
        return Ok(None);
    };
    let head = chain.head_index();
    let reader = chain.reader(memory).map_err(|error| fault(&error))?;
    let mut bytes = Vec::with_capacity(MAX_FRAME_LEN);
    reader.take(MAX_FRAME_LEN as u64 + 1).read_to_end(&mut bytes).map_err(|error| fault(&error))?;
    queue.add_used(memory, head, 0).map_err(|error| fault(&error))?;
    Ok(Some(bytes))
}

/// Writes `bytes` into the next writable buffer and hands it to the agent. Answers `false` if the agent has offered none.
pub(crate) fn put_buffer(
    number: u16,
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    bytes: &[u8],
) -> Result<bool, ApplianceError> {
    let fault = |error: &dyn std::error::Error| ApplianceError::Queue { queue: number, problem: error.to_string() };
    let Some(chain) = queue.iter(memory).map_err(|error| fault(&error))?.next() else {
        return Ok(false);
    };
    let head = chain.head_index();
    let mut writer = chain.writer(memory).map_err(|error| fault(&error))?;
    writer.write_all(bytes).map_err(|error| fault(&error))?;
    let len = u32::try_from(bytes.len()).map_err(|error| fault(&error))?;
    queue.add_used(memory, head, len).map_err(|error| fault(&error))?;
    Ok(true)
}
