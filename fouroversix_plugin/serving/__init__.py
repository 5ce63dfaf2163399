"""Serving through inference engines: ``layer`` knows no engine, each other module exactly one."""
