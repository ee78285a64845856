"""What a run costs before it is started: memory, bytes on the wire, time. No run depends on this folder."""
