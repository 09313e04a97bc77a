"""The command line: one thin file per verb, imported when its verb is called."""
