//! Runs a program to its end; if it fails, all that it wrote is in the error.

use std::process::{Command, Stdio};

use crate::SetupError;

/// What a program wrote on standard output, with nothing to read.
pub(crate) fn output_of(command: &mut Command) -> Result<String, SetupError> {
    output_with(command, Stdio::null())
}

/// The same with a standard input.
pub(crate) fn output_with(command: &mut Command, input: Stdio) -> Result<String, SetupError> {
    let output =
        command.stdin(input).output().map_err(|source| SetupError::Start { program: name_of(command), source })?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let output_text = text + &String::from_utf8_lossy(&output.stderr);
    Err(SetupError::Failed { program: line_of(command), status: output.status, output: output_text.trim_end().into() })
}

/// The program's name, for messages.
pub(crate) fn name_of(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

/// The program's name and arguments, for messages.
pub(crate) fn line_of(command: &Command) -> String {
    let mut line = name_of(command);
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    line
}
