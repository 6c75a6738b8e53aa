#!lua flags=allow-oom
-- include keys.lua
-- ARGV[1]: ms. The server's clock alone counts, so hosts need not agree on the time.
local now = redis.call('TIME')
local since = now[1] * 1000 + math.floor(now[2] / 1000) - ARGV[1]
return redis.call('ZRANGEBYSCORE', K.workers, string.format('%.0f', since), '+inf')
