"""Where a program comes from: importers that turn torch programs into the IR."""
