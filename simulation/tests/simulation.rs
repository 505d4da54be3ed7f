//! Bridge and agent against each other, in one process, through random schedules.
//!
//! Real are the bridge (`vvu_bridge::bridge::serve`, with its device tasks and its sockets) and the agent
//! (`vvu_agent::session::DeviceSet`). Simulated is what stands around them: the appliance's VMM (`vmm`, `device`, `doorbell`),
//! the machine in it that boots (`appliance`, `ring`), a back-end (`host`, `back_end`) and the driver VM with its front-end
//! (`machine`, `virtq`, `front_end`). All of them are tasks of one thread, over real sockets, eventfds and memory files, and
//! time is the paused clock of tokio: it moves on when nobody has anything to do.
//!
//! A `schedule` disturbs them: appliances and front-ends are started, killed, rebooted in whatever they are doing. `checks` and
//! the simulated parts themselves know what must be true all the while. What fails is printed with its seed; to play one again:
//!
//! ```text
//! cargo xtask simulate --seed SEED --schedules 1
//! ```

#[cfg(test)]
mod simulation {
    mod appliance;
    mod back_end;
    mod checks;
    mod device;
    mod device_state;
    mod dirty_pages;
    mod doorbell;
    mod file;
    mod front_end;
    mod host;
    mod log;
    mod machine;
    mod questions;
    mod ring;
    mod schedule;
    mod task;
    mod tests;
    mod virtq;
    mod vmm;
    mod world;
}
