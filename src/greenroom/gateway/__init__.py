"""The wake-on-request gateway: HTTP/1.1 to actors by name, asleep or not."""
