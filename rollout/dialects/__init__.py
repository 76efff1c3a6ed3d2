"""Wire formats that other tools speak, translated to generations and back: pure, without a server."""
