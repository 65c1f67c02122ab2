"""Domain adaptation: methods, how far two domains are apart, which kind of shift it is, what to select by."""
