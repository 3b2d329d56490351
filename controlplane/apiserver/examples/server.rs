//! Runs the API server alone: `server DATA_DIR [LISTEN [TOKEN_FILE]]`.

use std::path::PathBuf;
use std::process::ExitCode;

use orlop_apiserver::{Config, run};
use orlop_base::supervise::Ready;
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> ExitCode {
    orlop_base::telemetry::init("info");
    let mut args = std::env::args().skip(1);
    let Some(data_dir) = args.next() else {
        eprintln!("usage: server DATA_DIR [LISTEN [TOKEN_FILE]]");
        return ExitCode::from(2);
    };
    let mut config = Config::new(PathBuf::from(data_dir));
    if let Some(listen) = args.next() {
        match listen.parse() {
            Ok(address) => config.listen = address,
            Err(e) => {
                eprintln!("{listen}: {e}");
                return ExitCode::from(2);
            }
        }
    }
    config.token_auth_file = args.next().map(PathBuf::from);
    let stop = CancellationToken::new();
    let signal = stop.clone();
    let server = run(config, Ready::default(), stop);
    tokio::pin!(server);
    let result = tokio::select! {
        result = &mut server => result,
        _ = tokio::signal::ctrl_c() => {
            signal.cancel();
            server.await
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{}", orlop_base::telemetry::chain(&e));
            ExitCode::FAILURE
        }
    }
}
