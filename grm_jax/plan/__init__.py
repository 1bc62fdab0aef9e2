"""What a run will need, before it is paid for: its programs compiled for a topology that is not there."""
