"""Transfer of a pre-trained encoder to tasks, frozen or trained along (LCL, appendix A.2 and Tab. 8)."""
