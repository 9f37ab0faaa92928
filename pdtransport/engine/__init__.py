"""Engine-independent parts of a connector, such as wakeups and block reference counts. Imports no engine."""
