//! Probing by a command in the container.

use std::time::Duration;

use crate::context::Context;

/// Exit code 0 within the time limit is success.
pub async fn run(
    ctx: &Context,
    container_id: &str,
    command: Vec<String>,
    timeout: Duration,
) -> Result<(), String> {
    let done = ctx.cri.exec_sync(container_id, command, timeout).await.map_err(|e| match e.code() {
        tonic::Code::DeadlineExceeded => format!("command timed out after {}s", timeout.as_secs()),
        _ => e.message(),
    })?;
    if done.exit_code == 0 {
        return Ok(());
    }
    let mut output = done.stdout;
    output.extend(done.stderr);
    let text = String::from_utf8_lossy(&output).trim().chars().take(512).collect::<String>();
    Err(if text.is_empty() { format!("command exited with {}", done.exit_code) } else { text })
}
