"""Operations, leases, scheduling and recovery: async shells around the pure core."""
