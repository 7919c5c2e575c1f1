"""The command line: parse, call, print. Heavy imports live inside the commands, so that help is instant."""
