//! What the scripted back-end can be told to do: SET_CONFIG carries the command, its answer says what came of it.

use vvu_protocol::message::{ConfigSpace, FrontEndRequest};

/// What SET_CONFIG tells it to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    /// Sends CONFIG_CHANGE, asks for an answer, and answers with it.
    AskConfigChange,
    /// Sends CONFIG_CHANGE and asks for no answer.
    TellConfigChange,
    /// Sends a miss of the IOTLB, asks for an answer, and answers with it.
    AskMiss,
    /// Sends SHARED_OBJECT_ADD, asks for an answer, and answers with it.
    AskSharedObject,
    /// Sends SHARED_OBJECT_LOOKUP, which has a reply of its own, and answers with its value.
    AskLookup,
    /// Sends an unknown request, asks for an answer, and answers with it.
    AskUnknown,
    /// Sends CONFIG_CHANGE without end, beside everything else.
    Flood,
    /// Answers with the number of messages that the flood has sent.
    CountFlood,
    /// Sends what is no message on the back channel.
    Garble,
    /// Sends a reply that nobody asked for on the back channel.
    Reply,
    /// Sends a known request of the wrong length on the back channel.
    Misform,
    /// Closes the back channel.
    CloseBackChannel,
    /// Prefers a pipe of its own at the next transfer.
    UseOwnPipe,
    /// Hands over what is no pipe at the next transfer.
    UseOwnFile,
    /// Refuses the next transfer.
    RefuseTransfer,
    /// Stops after the first bytes of a state that is loaded.
    StopReading,
    /// Has a state that no pipe takes at once.
    LargeState,
    /// Loses its memory, without a message.
    ForgetMemory,
    /// Closes the connection and lives on.
    Leave,
    /// Dies.
    Die,
}

const COMMANDS: [Command; 20] = [
    Command::AskConfigChange,
    Command::TellConfigChange,
    Command::AskMiss,
    Command::AskSharedObject,
    Command::AskLookup,
    Command::AskUnknown,
    Command::Flood,
    Command::CountFlood,
    Command::Garble,
    Command::Reply,
    Command::Misform,
    Command::CloseBackChannel,
    Command::UseOwnPipe,
    Command::UseOwnFile,
    Command::RefuseTransfer,
    Command::StopReading,
    Command::LargeState,
    Command::ForgetMemory,
    Command::Leave,
    Command::Die,
];

/// The request that gives a command.
pub(crate) fn command<F>(command: Command) -> FrontEndRequest<F> {
    let position = COMMANDS.iter().position(|other| *other == command).unwrap();
    FrontEndRequest::SetConfig(ConfigSpace { offset: 0, flags: 0, bytes: vec![u8::try_from(position).unwrap()] })
}

/// The command in the first byte of SET_CONFIG.
pub(crate) fn commanded(config: &ConfigSpace) -> Command {
    COMMANDS[usize::from(config.bytes[0])]
}
