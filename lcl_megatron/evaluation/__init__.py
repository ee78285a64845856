"""What a frozen encoder knows: its features of labelled images, scored by nearest neighbours and a linear probe."""
