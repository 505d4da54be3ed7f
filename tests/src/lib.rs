//! Whole machines: a driver VM, the bridge and an appliance VM together, as an operator runs them.
//!
//! The crate is a harness and its three users: the whole-machine tests (`tests/tests/machines/`), [`demo`] (the main job in
//! front of a person's eyes) and [`mod@bench`] (figures, always as ratios to a vhost-user back-end on the host). All three
//! start the same real programs: stock QEMU, a stock kernel, the `vvu` command and a real image file.
//!
//! Where to look:
//! - [`testbed`]: one test's place: its folder of logs, its sockets, its turn on the machine.
//! - [`driver_vm`]: boots a driver VM and runs shell commands in it; [`driver_image`]: what it boots.
//! - [`backend`] and [`network`]: what serves the disk, or the network: `vvu`, or for comparison a back-end directly on the
//!   host.
//! - [`network`] has what lies between two driver VMs: streams that are checked, the cards' statistics, a cable between two
//!   appliances. `vvu-station` (`tests/station`) is what runs in the driver VM for it.
//! - [`vvu_run`]: one `vvu run` and all of its processes.
//! - [`witness`]: a load in the driver VM that knows what the disk must hold.
//! - [`surroundings`]: storage that fails.
//! - [`capacity`]: what many devices cost, from what one was measured to cost.
//! - [`image_file`] and [`evidence`]: what the host can see: image contents, memory maps, counters.
//!
//! It never replaces a part by a mock, never reaches into another crate's internals (it sees what an operator sees:
//! command line, log, `/proc`) and leaves no process behind, not even when a test panics.

pub mod backend;
pub mod bench;
pub mod capacity;
pub mod counters;
pub mod demo;
pub mod driver_image;
pub mod driver_vm;
pub mod evidence;
pub mod files;
pub mod fio;
pub mod footprint;
pub mod image_file;
pub mod iperf;
pub mod loss;
pub mod network;
pub mod packaged;
pub mod pauses;
pub mod process;
pub mod qmp;
pub mod soak;
pub mod surroundings;
pub mod testbed;
pub mod vvu_run;
pub mod witness;
