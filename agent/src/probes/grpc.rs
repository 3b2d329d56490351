//! Probing by the gRPC health protocol (grpc.health.v1).

use std::time::Duration;

use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Endpoint;
use tonic_prost::ProstCodec;

#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckResponse {
    /// 1 is SERVING.
    #[prost(int32, tag = "1")]
    status: i32,
}

/// SERVING within the time limit is success.
pub async fn check(host: &str, port: u16, service: String, timeout: Duration) -> Result<(), String> {
    match tokio::time::timeout(timeout, ask(host, port, service.clone())).await {
        Ok(r) => r,
        Err(_) => Err(format!("timeout: health rpc did not complete within {}s", timeout.as_secs())),
    }
}

async fn ask(host: &str, port: u16, service: String) -> Result<(), String> {
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let endpoint = Endpoint::try_from(format!("http://{host}:{port}")).map_err(|e| e.to_string())?;
    let channel = endpoint.connect().await.map_err(|e| {
        format!("failed to connect service \"{host}:{port}\": {}", orlop_base::telemetry::chain(&e))
    })?;
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.map_err(|e| e.to_string())?;
    let path = PathAndQuery::from_static("/grpc.health.v1.Health/Check");
    let codec: ProstCodec<HealthCheckRequest, HealthCheckResponse> = ProstCodec::default();
    let request = tonic::Request::new(HealthCheckRequest { service: service.clone() });
    let answer = grpc.unary(request, path, codec).await;
    let answer = answer.map_err(|s| match s.code() {
        tonic::Code::Unimplemented => {
            "this server does not implement the grpc health protocol (grpc.health.v1.Health)".to_owned()
        }
        _ => format!("health rpc probe failed: {}", s.message()),
    })?;
    let status = answer.into_inner().status;
    if status == 1 { Ok(()) } else { Err(format!("service unhealthy (responded with {status})")) }
}
