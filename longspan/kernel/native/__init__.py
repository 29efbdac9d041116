"""The native kernel: a C++ library of our own, for CPU."""
