"""Integrations with other libraries, a module each; nothing here is imported by `jaxjd` itself."""
