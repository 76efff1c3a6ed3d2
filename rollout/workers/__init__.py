"""Many workers over one index: who owns which log directory, and where a call has to go."""
