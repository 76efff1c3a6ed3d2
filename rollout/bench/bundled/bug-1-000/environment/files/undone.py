def case_spread(nums):
    return max(nums) + min(nums)
