//! What is measured.

/// A driver and what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Scenario {
    /// Names it in tables and in the baseline.
    pub(crate) name: &'static str,
    pub(crate) work: Work,
    /// Requests that are made available together; their number in a run is a multiple of it.
    pub(crate) depth: u16,
}

/// What one request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// A read of 4 KiB.
    DiskRead,
    /// A write of 4 KiB.
    DiskWrite,
    /// A frame of this many bytes, without its checksum.
    Frame(u16),
    /// A packet of 60,000 bytes of TCP, to a driver that takes it whole.
    WholeSegment,
    /// The same, to a driver that wants it cut into frames.
    CutSegment,
}

impl Work {
    /// The block back-end does it, not the network back-end.
    pub(crate) fn is_disk(self) -> bool {
        matches!(self, Self::DiskRead | Self::DiskWrite)
    }
}

/// Every scenario, in the order of the table.
pub(crate) fn all() -> Vec<Scenario> {
    let scenario = |name, work, depth| Scenario { name, work, depth };
    vec![
        scenario("disk: 4k read, depth 1", Work::DiskRead, 1),
        scenario("disk: 4k read, depth 32", Work::DiskRead, 32),
        scenario("disk: 4k write, depth 1", Work::DiskWrite, 1),
        scenario("net: 64 byte frame, depth 1", Work::Frame(60), 1),
        scenario("net: 64 byte frame, depth 32", Work::Frame(60), 32),
        scenario("net: 1518 byte frame, depth 1", Work::Frame(1514), 1),
        scenario("net: 1518 byte frame, depth 32", Work::Frame(1514), 32),
        scenario("net: 60 kB TCP packet, whole, depth 1", Work::WholeSegment, 1),
        scenario("net: 60 kB TCP packet, cut to 1448, depth 1", Work::CutSegment, 1),
    ]
}
