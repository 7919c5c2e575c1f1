"""The settings of each command as one frozen record: its flags, config keys, checks and what run.json keeps."""
