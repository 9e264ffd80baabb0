"""The operators: checked, registered with torch, and given an implementation per device."""
