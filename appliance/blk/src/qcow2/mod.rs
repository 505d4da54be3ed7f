//! Disks in the format qcow2, with their backing files.
//!
//! The crate `imago` understands the format. Here is decided which files it gets: the ones that the operator has named, in
//! that order. What an image says of other files is compared with that, and never leads to one being opened.
//!
//! # Theory of operation
//! Understanding the format takes memory of tables, and some of it is newer than the image. So a disk is *in use* from the
//! first of its rings that starts to the last that stops, and only then: with the last one everything is written back, and
//! with the next one it is all read anew. In between another program may work on the image, as that of a second appliance
//! does to which the device moves.
//!
//! Requests are carried out by a pool of threads ([`pool`]), for the format's driver waits for its storage. What is known to lie
//! in one piece ([`places`]) is read by the thread of the ring, as from an image without a format.
//!
//! - pure: [`header`], [`places`]
//! - [`disk`]: the files and the format's driver; [`transfer`]: data to and from driver memory; [`pool`]: the threads

pub(crate) mod disk;
pub(crate) mod header;
pub(crate) mod places;
pub(crate) mod pool;
pub(crate) mod transfer;
