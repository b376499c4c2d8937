"""What every op is as an element, or a vector of elements, of its result: one file for each kind of op."""
