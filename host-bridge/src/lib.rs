//! host-bridge
