//! Generates the wire types with protox, so that no protoc is needed. NRI's services are called by name (`ttrpc.rs`).

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let types = protox::compile(["nri.proto", "ttrpc.proto"], ["proto"])?;
    tonic_prost_build::configure().build_client(false).build_server(false).compile_fds(types)?;
    Ok(())
}
