"""What runs on a device: a supervisor (control stream, store, heartbeat) and one worker per deployment."""
