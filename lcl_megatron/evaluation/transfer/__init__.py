"""What tasks that transfer an encoder share (LCL, appendix A.2 and Tab. 8): image sets, training, sessions, results."""
