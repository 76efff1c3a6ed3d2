"""The client of an Edge: sandboxes from Python, over gRPC; `dsec.Sandbox` and `dsec.AsyncSandbox` live here."""
