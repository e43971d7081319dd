"""The program in the batch step of a job (or started by the local driver): starts, watches and ends workers."""
