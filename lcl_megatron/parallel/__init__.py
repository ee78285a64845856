"""The only folder that talks to other ranks: groups, gathers, pipeline, sequence split, the CPU host."""
