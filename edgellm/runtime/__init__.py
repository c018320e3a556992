"""The serving core: requests in, streamed tokens out. Import from the modules; this file stays empty."""
