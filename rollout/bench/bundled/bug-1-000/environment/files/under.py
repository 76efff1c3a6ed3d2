def casing_spread(nums):
    return max(nums) + min(nums)
