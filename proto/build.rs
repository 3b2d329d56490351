//! Generates the wire types with protox, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for file in ["cri.proto", "images.proto", "monitor.proto"] {
        println!("cargo:rerun-if-changed={file}");
    }
    let cri = protox::compile(["cri.proto"], ["."])?;
    tonic_prost_build::configure().skip_debug(["runtime.v1.AuthConfig"]).compile_fds(cri)?;
    let images = protox::compile(["images.proto"], ["."])?;
    tonic_prost_build::configure().compile_fds(images)?;
    let monitor = protox::compile(["monitor.proto"], ["."])?;
    tonic_prost_build::configure().build_client(false).build_server(false).compile_fds(monitor)?;
    Ok(())
}
