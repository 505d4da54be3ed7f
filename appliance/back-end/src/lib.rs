//! What a vhost-user back-end needs to lose no request when it is restarted, migrated or put behind an IOMMU.
//!
//! Used by our back-ends, in the appliance VM as well as on a host. It never does a device's own work.

pub mod dirty_log;
pub mod inflight;
pub mod iotlb;
mod shared_mapping;
