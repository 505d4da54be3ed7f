//! The end of a program that others wrote: asked for from the host, and given time.
//!
//! Such a program may keep in memory what belongs on a disk: QEMU's storage daemon, for one, the tables of a qcow2 image. An
//! appliance that is switched off takes that along. So whoever wants to end it writes a line to the agent's channel; the agent
//! hangs up on the program's sockets, sends it SIGTERM, and switches the appliance off when it has ended, or after a while.

use std::io;

use tracing::{info, warn};
use vvu_appliance_config::{END_GRACE, END_REQUEST};

use crate::channel::Port;
use crate::process::BackEndProcess;

/// Bytes that are read at once.
const BUFFER_LEN: usize = 256;

/// The way to end one program.
#[derive(Debug)]
pub struct OrderlyEnd {
    port: Port,
    process: BackEndProcess,
}

impl OrderlyEnd {
    /// The end of a program, which is asked for on a port.
    #[must_use]
    pub const fn new(port: Port, process: BackEndProcess) -> Self {
        Self { port, process }
    }

    /// Waits until somebody asks for it. Other lines mean nothing.
    ///
    /// # Errors
    /// If the port fails.
    pub async fn wanted(&self) -> io::Result<()> {
        loop {
            self.port.client().await?;
            if self.hears_request().await? {
                info!("the end is wanted");
                return Ok(());
            }
        }
    }

    /// Whether the client that is connected asks, before it goes.
    async fn hears_request(&self) -> io::Result<bool> {
        let mut line = Vec::new();
        let mut buffer = [0; BUFFER_LEN];
        loop {
            let read = self.port.read(&mut buffer).await?;
            let bytes = buffer.get(..read).unwrap_or_default();
            if bytes.is_empty() {
                return Ok(false);
            }
            for byte in bytes {
                // One byte more than the longest line that means something shows that this one does not.
                if line.len() <= END_REQUEST.len() {
                    line.push(*byte);
                }
                if *byte == b'\n' {
                    if line == END_REQUEST.as_bytes() {
                        return Ok(true);
                    }
                    warn!("the host asks for something unknown");
                    line.clear();
                }
            }
        }
    }

    /// Asks the program to end, and waits until nothing of it is left: it is killed if it takes too long.
    pub async fn end_program(self) {
        self.process.end_in_order(END_GRACE).await;
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::path::Path;
    use std::time::Duration;

    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixStream;
    use tokio::time::{Instant, timeout};

    use super::*;
    use crate::process::{BackEndProgram, Output};
    use crate::reaper::{Reaper, Scope};

    const LIMIT: Duration = Duration::from_secs(30);

    /// Runs a shell script as the program, which has begun when it has made the file `begun` in its directory.
    async fn play(script: &str, story: impl AsyncFnOnce(OrderlyEnd, UnixStream, &Path)) {
        let directory = tempfile::tempdir().unwrap();
        let (reaper, reaping) = Reaper::new(Scope::OwnChildren).unwrap();
        let program = BackEndProgram {
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            environment: vec![("PATH".into(), "/bin:/usr/bin".into())],
            directory: directory.path().to_owned(),
            sockets: Vec::new(),
            user: None,
            output: Output::Inherited,
            window: None,
        };
        let process = BackEndProcess::new(program, reaper);
        process.running().unwrap();
        let begun = directory.path().join("begun");
        let began =
            crate::watch::wait_for(directory.path(), LIMIT, || Ok::<_, io::Error>(begun.exists().then_some(())));
        assert!(began.await.unwrap().is_some());
        let (host, node) = UnixStream::pair().unwrap();
        let port = Port::new(OwnedFd::from(node.into_std().unwrap())).unwrap();
        tokio::select! {
            () = story(OrderlyEnd::new(port, process), host, directory.path()) => {}
            ended = reaping.run() => panic!("reaper ended: {ended:?}"),
        }
    }

    #[tokio::test]
    async fn a_program_that_is_asked_saves_what_it_has() {
        play(
            "trap 'echo saved > saved; exit 0' TERM; : > begun; while :; do sleep 0.01; done",
            async |end, _, directory| {
                end.end_program().await;
                assert_eq!(std::fs::read_to_string(directory.join("saved")).unwrap(), "saved\n");
            },
        )
        .await;
    }

    #[tokio::test]
    async fn a_program_that_does_not_listen_is_killed() {
        play("trap '' TERM; : > begun; while :; do sleep 0.01; done", async |end, _, _| {
            let process = end.process.clone();
            let run = process.running().unwrap();
            let asked = Instant::now();
            end.end_program().await;
            assert_eq!(run.exited().await, crate::reaper::Exit::Signal(9));
            assert!(asked.elapsed() >= END_GRACE, "it had {:?} only", asked.elapsed());
        })
        .await;
    }

    #[tokio::test]
    async fn only_the_request_is_one() {
        play(": > begun; exec sleep 1000", async |end, mut host, _| {
            let mut wanted = std::pin::pin!(end.wanted());
            for nonsense in
                ["\n", "{}\n", "end\n", "{\"end\":{}} \n", &"x".repeat(10_000), "{\"end\":{}}\n", "{\"end\""]
            {
                host.write_all(nonsense.as_bytes()).await.unwrap();
            }
            assert!(timeout(Duration::from_millis(50), &mut wanted).await.is_err());
            host.write_all(b":{}}\n").await.unwrap();
            timeout(LIMIT, wanted).await.unwrap().unwrap();
        })
        .await;
    }
}
