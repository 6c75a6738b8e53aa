#!lua
-- include keys.lua
-- ARGV: dead letter's id, "requests" or "groups", body. The dedupe record is left alone: it says that the key was published
-- once, and this is that publication again.
local letter = redis.call('XRANGE', K.dead, ARGV[1], ARGV[1])[1]
if not letter then return {'gone'} end
redis.call('XADD', K[ARGV[2]], '*', 'key', letter[2][2], 'body', ARGV[3])
redis.call('XDEL', K.dead, ARGV[1])
return {'ok'}
