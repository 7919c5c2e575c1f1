"""A slim checkpoint of one exit: cut, described, and verified against its audit."""
