//! On which CPUs the threads of queues run.

use std::str::FromStr;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// A CPU of a list that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("CPU {cpu} is not there, or not for this process; leave it out of --cpus")]
pub struct UnusableCpu {
    /// Its number.
    pub cpu: usize,
}

/// A list of CPUs, as `0,2-3`: queue 0 runs on the first of them, queue 1 on the second, and so on, from the start again behind
/// the last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuList {
    cpus: Vec<usize>,
}

impl FromStr for CpuList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            match (first.parse::<usize>(), last.parse::<usize>()) {
                (Ok(first), Ok(last)) if first <= last && last < CpuSet::MAX_CPU => cpus.extend(first..=last),
                _ => return Err(format!("'{part}' is no CPU and no range of CPUs; give a list as 0,2-3")),
            }
        }
        Ok(Self { cpus })
    }
}

impl CpuList {
    /// Checks that this process may use all of them.
    ///
    /// # Errors
    /// The first that it may not use.
    pub fn check(&self) -> Result<(), UnusableCpu> {
        let usable = sched_getaffinity(None);
        let is_usable = |cpu: usize| usable.as_ref().is_ok_and(|set| set.is_set(cpu));
        self.cpus.iter().find(|cpu| !is_usable(**cpu)).map_or(Ok(()), |cpu| Err(UnusableCpu { cpu: *cpu }))
    }

    /// The CPU of a queue. A list is never empty.
    #[must_use]
    pub fn of_queue(&self, index: u16) -> Option<usize> {
        self.cpus.get(usize::from(index).checked_rem(self.cpus.len())?).copied()
    }
}

/// Lets the calling thread run on this CPU only.
///
/// # Errors
/// The CPU is not there, or not for this process.
pub(crate) fn pin_to(cpu: usize) -> rustix::io::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_go_round_the_list() {
        let list: CpuList = "0,2-3".parse().unwrap();
        assert_eq!([0, 1, 2, 3, 4].map(|queue| list.of_queue(queue)), [0, 2, 3, 0, 2].map(Some));
        for wrong in ["", "a", "1-", "3-2", "0,,1", "1024", "0-99999999999"] {
            assert!(wrong.parse::<CpuList>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_thread_stays_where_it_was_put() {
        let cpu = (0..CpuSet::MAX_CPU).find(|cpu| sched_getaffinity(None).unwrap().is_set(*cpu)).unwrap();
        assert_eq!(cpu.to_string().parse::<CpuList>().unwrap().check(), Ok(()));
        assert_eq!("1023".parse::<CpuList>().unwrap().check(), Err(UnusableCpu { cpu: 1023 }));
        std::thread::spawn(move || {
            pin_to(cpu).unwrap();
            assert_eq!(sched_getaffinity(None).unwrap().count(), 1);
        })
        .join()
        .unwrap();
    }
}
