//! Tells programs that others wrote how large the window is.
//!
//! Many a back-end compares the length of a memory region with that of the file it is to map: it seeks to the file's end. A
//! device-DAX node has a length, but its kernel driver answers that one question with 0, so such a back-end refuses all of
//! the driver VM's memory. Here the question is answered in the kernel's stead: a seccomp filter has the kernel ask the agent
//! whenever the program seeks relative to a file's end (Linux, seccomp_unotify(2)), and the agent answers if that file is the
//! window's node, else it has the kernel go on. The program itself is unmodified, and may be static.
//!
//! The answer is a number for the program alone, which may be told anything: nothing here depends on what the program says.

mod syscalls;

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::process::Command;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::fstat;
use rustix::io::{Errno, retry_on_intr};
use tokio::io::Interest;

use syscalls::{Answer, Seek};

/// The agent's end of one program's filter.
#[derive(Debug)]
pub struct AgentHalf {
    /// The program sends the kernel's questions' descriptor here, just before it begins.
    descriptor_from: UnixStream,
}

/// Has the next program that `command` starts ask about the ends of files. It must be started once; without
/// [`AgentHalf::serve`] it waits for ever when it asks.
///
/// # Errors
/// If there are no descriptors left.
pub fn apply(command: &mut Command) -> io::Result<AgentHalf> {
    let (descriptor_from, descriptor_to) = UnixStream::pair()?;
    descriptor_from.set_nonblocking(true)?;
    syscalls::filter_at_start(command, descriptor_to.into());
    Ok(AgentHalf { descriptor_from })
}

impl AgentHalf {
    /// Answers until no process with this filter is left: the program, and what it has started. `node` is the window's node,
    /// and `len` its length in bytes.
    ///
    /// # Errors
    /// If the program did not begin, or the kernel refuses something.
    pub async fn serve(self, node: impl AsFd, len: u64) -> io::Result<()> {
        let node = Node { device: fstat(node)?.st_rdev, len };
        let Some(questions) = self.questions().await? else { return Ok(()) };
        let questions = syscalls::watch(questions)?;
        loop {
            let mut ready = questions.readable().await?;
            let state = state_of(questions.get_ref())?;
            if state.contains(PollFlags::IN) {
                node.answer_one(questions.get_ref())?;
            } else if state.contains(PollFlags::HUP) {
                return Ok(());
            } else {
                ready.clear_ready();
            }
        }
    }

    /// The descriptor that the program sends; `None` if it has not come so far.
    async fn questions(self) -> io::Result<Option<OwnedFd>> {
        let stream = tokio::net::UnixStream::from_std(self.descriptor_from)?;
        loop {
            stream.readable().await?;
            match stream.try_io(Interest::READABLE, || Ok(syscalls::receive_descriptor(&stream)?)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                received => return received,
            }
        }
    }
}

/// What is there to be read at this moment. Reading when there is nothing would block the whole agent.
fn state_of(questions: &OwnedFd) -> io::Result<PollFlags> {
    let mut looked_at = [PollFd::new(questions, PollFlags::IN)];
    // It does not wait, but a signal that is pending counts all the same.
    retry_on_intr(|| poll(&mut looked_at, Some(&Timespec::default())))?;
    let [looked_at] = looked_at;
    Ok(looked_at.revents())
}

/// The window's node as the kernel knows it.
#[derive(Debug, Clone, Copy)]
struct Node {
    device: u64,
    len: u64,
}

impl Node {
    /// Takes one question and answers it. Who has asked may have been killed since.
    fn answer_one(self, questions: &OwnedFd) -> io::Result<()> {
        let question = match syscalls::take_question(questions) {
            Err(Errno::NOENT | Errno::INTR) => return Ok(()),
            question => question?,
        };
        match syscalls::answer(questions, question.id, self.answer_to(&question)) {
            Err(Errno::NOENT) => Ok(()),
            answered => Ok(answered?),
        }
    }

    fn answer_to(self, seek: &Seek) -> Answer {
        let path = format!("/proc/{}/fd/{}", seek.task, seek.descriptor);
        let is_node =
            fs::metadata(path).is_ok_and(|meta| meta.file_type().is_char_device() && meta.rdev() == self.device);
        if !is_node {
            return Answer::AskTheKernel;
        }
        let position = i64::try_from(self.len).ok().and_then(|len| len.checked_add(seek.offset));
        position.filter(|position| *position >= 0).map_or(Answer::Invalid, Answer::Position)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Seek as _, SeekFrom};
    use std::process::Stdio;

    use super::*;

    const LEN: u64 = 4 << 30;

    /// The program: this test binary, with a test that asks and says what it has heard.
    fn asking() -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "node_size::tests::asks", "--ignored", "--nocapture"]).stdout(Stdio::piped());
        command
    }

    #[test]
    #[ignore = "the program that another test starts"]
    fn asks() {
        let mut null = File::open("/dev/null").unwrap();
        let mut own = File::open(std::env::current_exe().unwrap()).unwrap();
        let zero = File::open("/dev/zero").unwrap().seek(SeekFrom::End(0)).unwrap();
        let from_thread = std::thread::spawn(|| File::open("/dev/null").unwrap().seek(SeekFrom::End(0)).unwrap());
        println!(
            "heard {} {} {} {} {} {} {}",
            null.seek(SeekFrom::End(0)).unwrap(),
            null.seek(SeekFrom::End(-4096)).unwrap(),
            null.seek(SeekFrom::End(i64::MIN)).is_err(),
            null.seek(SeekFrom::Start(7)).unwrap(),
            own.seek(SeekFrom::End(0)).unwrap() == own.metadata().unwrap().len(),
            zero,
            from_thread.join().unwrap(),
        );
    }

    #[tokio::test]
    async fn the_node_has_a_length_and_other_files_have_their_own() {
        let node = File::open("/dev/null").unwrap();
        let mut command = asking();
        let agent_half = apply(&mut command).unwrap();
        let child = command.spawn().unwrap();
        drop(command);
        agent_half.serve(&node, LEN).await.unwrap();
        let output = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        // The kernel lets /dev/null be sought to anywhere, and says 0.
        let expected = format!("heard {LEN} {} true 0 true 0 {LEN}", LEN - 4096);
        assert!(output.contains(&expected), "{output}");
    }

    #[tokio::test]
    async fn a_program_that_does_not_begin_is_not_waited_for() {
        let mut command = Command::new("/nowhere/program");
        let agent_half = apply(&mut command).unwrap();
        assert!(command.spawn().is_err());
        drop(command);
        agent_half.serve(File::open("/dev/null").unwrap(), LEN).await.unwrap();
    }

    #[tokio::test]
    async fn a_killed_program_leaves_nothing_to_wait_for() {
        let mut command = Command::new("sleep");
        command.arg("1000");
        let agent_half = apply(&mut command).unwrap();
        let mut child = command.spawn().unwrap();
        drop(command);
        let serving = agent_half.serve(File::open("/dev/null").unwrap(), LEN);
        child.kill().unwrap();
        child.wait().unwrap();
        serving.await.unwrap();
    }
}
