from polyhead_command import entry

entry()
