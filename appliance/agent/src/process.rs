//! A back-end program as a process, which one device set or several use: started when one of them needs it, and again when it
//! has ended, up to a limit.
//!
//! Several device sets may see the end of the same process, and each tells of it. A *run* is the time from a start to an end;
//! it counts as one failure at the most, whoever tells first. A run that was ended on purpose counts as none.

use std::cell::{Cell, RefCell};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::net::unix::pipe;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};
use vvu_protocol::dax::NODE_OFFSET;

use crate::in_one_line;
use crate::node_size;
use crate::output::log_lines;
use crate::process_table::{holds, kill_user, of_user};
use crate::reaper::{Child, Exit, Reaper};
use crate::restarts::{MAX_RESTARTS, PERIOD, RestartLimit};
use crate::user::User;
use crate::window::WindowNode;

/// Between two looks for what is left of a program: no event tells of the end of a process that is not one's own child.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// A back-end program and how it is started.
#[derive(Debug, Clone)]
pub struct BackEndProgram {
    /// The program: a path, or a name that is looked for in the `PATH` of its environment.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Its environment: nothing is inherited.
    pub environment: Vec<(OsString, OsString)>,
    /// Working directory.
    pub directory: PathBuf,
    /// Where it listens. The directories exist, and the program may write to them.
    pub sockets: Vec<PathBuf>,
    /// Whom to run it as, or `None` for the agent's own user. No other program has it.
    pub user: Option<User>,
    /// Where its output goes.
    pub output: Output,
    /// The window whose length it is told when it asks for that in the way of files ([`node_size`]).
    pub window: Option<WindowNode>,
}

/// Where the output of a program goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// To where the agent's own goes: it is a log already, and limited.
    Inherited,
    /// Line by line into the agent's log, with the program's name, and limited.
    Logged,
}

/// The back-end has failed too often.
#[derive(Debug, thiserror::Error)]
#[error("back-end has failed more than {MAX_RESTARTS} times within {} s and is given up: the last time it {last}", PERIOD.as_secs())]
pub struct GaveUp {
    /// What it did the last time, as in "died: exit code 1".
    pub last: String,
}

/// Why there is no process.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoProcess {
    #[error(transparent)]
    GaveUp(#[from] GaveUp),
    #[error("cannot be started")]
    Start(#[source] io::Error),
}

/// A program and its process, if there is one. A clone is the same one; the last to go ends it.
#[derive(Debug, Clone)]
pub struct BackEndProcess {
    shared: Rc<Shared>,
}

#[derive(Debug)]
struct Shared {
    program: BackEndProgram,
    reaper: Reaper,
    run: RefCell<Option<Rc<Run>>>,
    restarts: RefCell<RestartLimit>,
    /// Why it is given up, if it is.
    given_up: RefCell<Option<String>>,
}

/// One process of the program.
#[derive(Debug)]
pub(crate) struct Run {
    child: Child,
    user: Option<User>,
    /// Its end has been counted, or is none to count.
    judged: Cell<bool>,
    /// It has answered on a connection.
    was_ready: Cell<bool>,
}

impl BackEndProcess {
    /// A program that has not been started yet.
    #[must_use]
    pub fn new(program: BackEndProgram, reaper: Reaper) -> Self {
        let shared = Shared {
            program,
            reaper,
            run: RefCell::default(),
            restarts: RefCell::default(),
            given_up: RefCell::default(),
        };
        Self { shared: Rc::new(shared) }
    }

    /// The last part of the program's path.
    pub(crate) fn name(&self) -> String {
        name(&self.shared.program.program)
    }

    /// The process that runs; it is started if there is none.
    pub(crate) fn running(&self) -> Result<Rc<Run>, NoProcess> {
        if let Some(last) = self.shared.given_up.borrow().clone() {
            return Err(GaveUp { last }.into());
        }
        let mut run = self.shared.run.borrow_mut();
        if let Some(run) = run.as_ref().filter(|run| !run.child.has_ended()) {
            return Ok(Rc::clone(run));
        }
        let next = match self.shared.start() {
            Ok(child) => {
                Run { child, user: self.shared.program.user, judged: Cell::new(false), was_ready: Cell::new(false) }
            }
            Err(error) => {
                let error = NoProcess::Start(error);
                self.shared.failed(in_one_line(&error));
                return Err(error);
            }
        };
        Ok(Rc::clone(run.insert(Rc::new(next))))
    }

    /// Takes note that a run has failed, and of what it did.
    pub(crate) fn failed(&self, run: &Run, what: String) {
        if !run.judged.replace(true) {
            self.shared.failed(what);
        }
    }

    /// Ends a run without asking it, because of what it did.
    pub(crate) async fn end(&self, run: &Run, what: String) {
        self.failed(run, what);
        run.stop().await;
    }

    /// Has the program end in order: it is asked to, and what is left of it after `grace` is killed. It is for who needs it no more.
    pub(crate) async fn end_in_order(&self, grace: Duration) {
        let run = self.shared.run.borrow().clone();
        let Some(run) = run.filter(|run| !run.child.has_ended()) else { return };
        run.judged.set(true);
        run.child.terminate();
        let name = self.name();
        match timeout(grace, run.child.exited()).await {
            Ok(exit) => info!("back-end {name} was asked to end: {exit}"),
            Err(_) => warn!("back-end {name} was asked to end and has not within {} s; it is killed", grace.as_secs()),
        }
        run.stop().await;
    }

    /// Ends a run, which is no failure of it. If it has ended by itself, it may have failed for another device set.
    pub(crate) async fn replace(&self, run: &Run) {
        if !run.child.has_ended() {
            run.judged.set(true);
        }
        run.stop().await;
    }
}

impl Shared {
    fn failed(&self, what: String) {
        if !self.restarts.borrow_mut().may_restart(Instant::now()) {
            self.given_up.replace(Some(what));
        }
    }

    fn start(&self) -> io::Result<Child> {
        let program = &self.program;
        if let Some(user) = program.user {
            // What the process before has left behind, and what it had started.
            kill_user(user)?;
        }
        for socket in &program.sockets {
            match fs::remove_file(socket) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        let mut command = Command::new(&program.program);
        command.args(&program.arguments).env_clear().envs(program.environment.iter().cloned());
        command.stdin(Stdio::null()).current_dir(&program.directory);
        if let Some(user) = program.user {
            user.apply(&mut command)?;
        }
        if program.output == Output::Logged {
            let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
            command.stdout(write.try_clone()?).stderr(write);
            tokio::spawn(log_lines(name(&program.program), pipe::Receiver::from_owned_fd(read)?));
        }
        let questions = program.window.as_ref().map(|_| node_size::apply(&mut command)).transpose()?;
        let child = self.reaper.spawn(&mut command)?;
        if let (Some(questions), Some(window)) = (questions, program.window.clone()) {
            tokio::spawn(async move {
                if let Err(error) = questions.serve(window.file, window.len.saturating_sub(NODE_OFFSET)).await {
                    warn!("back-end cannot be told the length of the window: {error}");
                }
            });
        }
        info!(pid = child.id(), program = %program.program.display(), "back-end started");
        Ok(child)
    }
}

impl Drop for Shared {
    /// Device sets that have ended leave no back-end behind.
    fn drop(&mut self) {
        if let Some(run) = self.run.get_mut() {
            run.kill();
        }
    }
}

impl Run {
    /// Takes note that it has answered on a connection.
    pub(crate) fn note_ready(&self) {
        self.was_ready.set(true);
    }

    /// Whether it has ever answered on a connection.
    pub(crate) const fn was_ready(&self) -> bool {
        self.was_ready.get()
    }

    /// Waits for the end of the process.
    pub(crate) async fn exited(&self) -> Exit {
        self.child.exited().await
    }

    /// Whether one of its processes maps a file of this name or has it open.
    pub(crate) fn holds(&self, name: &Path) -> io::Result<bool> {
        let processes = match self.user {
            Some(user) => of_user(user)?,
            None => vec![self.child.id()],
        };
        for pid in processes {
            if holds(pid, name)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Ends all processes of the run, and waits until they have gone.
    async fn stop(&self) {
        self.kill();
        self.child.exited().await;
        while self.user.is_some_and(|user| kill_user(user).unwrap_or(false)) {
            sleep(LOOK_AGAIN).await;
        }
    }

    fn kill(&self) {
        self.child.kill();
        if let Some(Err(error)) = self.user.filter(|_| !self.child.has_ended()).map(kill_user) {
            warn!("processes of the back-end cannot be found: {error}");
        }
    }
}

fn name(program: &Path) -> String {
    program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned()
}
