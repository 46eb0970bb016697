"""What the commands of the command line share: arguments, tables, configs by name, starting processes."""
