//! Wire contracts: CRI v1, the image store's service beside it, and the monitor protocol. No logic.

/// CRI v1 at the level of Kubernetes 1.36: messages, clients and servers of both services.
pub mod cri {
    #![allow(clippy::all)]
    tonic::include_proto!("runtime.v1");

    // AuthConfig carries registry credentials, which must never reach a log line.
    impl std::fmt::Debug for AuthConfig {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("AuthConfig")
                .field("username", &self.username)
                .field("server_address", &self.server_address)
                .finish_non_exhaustive()
        }
    }
}

/// What the CRI server offers of its image store beside CRI; see `images.proto`.
pub mod images {
    #![allow(clippy::all)]
    tonic::include_proto!("orlop.images.v1");
}

/// The protocol between the CRI server and the per-pod monitor; see `monitor.proto`.
pub mod monitor {
    #![allow(clippy::all)]
    include!(concat!(env!("OUT_DIR"), "/orlop.monitor.v1.rs"));
}
