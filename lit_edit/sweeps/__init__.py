"""Many runs: grids, points, gathering, comparison."""
