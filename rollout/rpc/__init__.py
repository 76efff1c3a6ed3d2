"""The service over gRPC: `grpc_server` translates, `calls` has a method an RPC, the rest is what they need."""
